"""Files of ``torch.save`` as data: an interpreter of pickles that imports and calls nothing."""
