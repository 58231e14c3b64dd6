"""One task of a run as a folder for another library: the weights, a model card, and a comparison of the logits."""
