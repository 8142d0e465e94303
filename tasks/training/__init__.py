"""Training of the embedded models: ``solvus train NAME`` makes the committed weights again."""
