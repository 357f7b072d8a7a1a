"""Pictures: data sets, files, preprocessing, augmentation, and batches."""
