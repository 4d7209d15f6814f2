"""A real process that ends at its k-th boundary call, k = 1, 2, 3 ...: nothing is lost, whichever it was."""
