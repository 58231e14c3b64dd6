"""One task of a trained model as a Vision Transformer of its own, in the forms that other libraries read."""
