"""What the routes ask of the stores, and the parameters of the questions."""
