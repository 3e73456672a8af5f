"""The two ways in which a command ends early on purpose."""


class UserError(ValueError):
    """A mistake in the input. The text is one sentence with the file, the field and both values.

    Commands print it without a traceback and exit with 1.
    """


class NonFiniteError(FloatingPointError):
    """The loss or the gradient norm is NaN or infinite; raised before the optimizer step."""
