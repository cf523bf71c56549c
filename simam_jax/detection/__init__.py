"""Two-stage detection in static shapes: Faster and Mask R-CNN (Ren et al., 2015; He et al., 2017) with FPN."""
