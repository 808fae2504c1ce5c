"""Train, lose a worker or a node, and go on with what is left, in another layout."""
