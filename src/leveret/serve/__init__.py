"""Station 8, offer: the terminal chat (`leveret.serve.chat.chat`)."""
