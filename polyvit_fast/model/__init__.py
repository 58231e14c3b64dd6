"""PolyViT: a tokenizer per modality, one shared trunk, a head per task."""
