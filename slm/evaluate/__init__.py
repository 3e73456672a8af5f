"""Models -> losses and bits per byte on named sets, and accuracy on tasks."""

from slm.stage import callable_package

callable_package(__name__)
