"""Detection as a task: data, training and evaluation of Faster and Mask R-CNN."""
