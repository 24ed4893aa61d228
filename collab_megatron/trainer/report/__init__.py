"""What a run shows: clocks, metrics, TensorBoard, the progress line."""
