"""What is seen: cameras, renderers, layers and golden frames."""
