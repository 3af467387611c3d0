"""What the user can put right about semantic IDs."""

from features.errors import UserError


class SidsError(UserError):
    """Content that no codebook can be fitted to, or a codebook that cannot be used; the message says what to do."""
