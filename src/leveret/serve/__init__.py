"""Station 8, offer: a server (`leveret.serve.run.serve`) and the terminal chat (`leveret.serve.chat.chat`)."""
