"""What a training run must not lose, under names that do not depend on the layout."""
