"""The drawn world: a source, a recipe and a suite like any other. No station knows that it is drawn."""
