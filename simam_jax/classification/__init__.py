"""Classification of images: one label an image."""
