"""A run's model, or one task of it, as a folder for others: the weights, a model card, and a comparison."""
