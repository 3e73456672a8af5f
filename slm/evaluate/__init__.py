"""Models -> losses and bits per byte on named sets, and accuracy on tasks."""
