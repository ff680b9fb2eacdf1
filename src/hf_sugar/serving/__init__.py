"""One HTTP server for both jobs of a model: it answers and embeds with one copy of the weights."""
