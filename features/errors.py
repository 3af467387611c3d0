"""The one base of every error that the user, not the programmer, can put right."""


class UserError(Exception):
    """Something the user gave is wrong; the message alone tells what, where, and what would be right.

    The command line prints such an error as one message and exits with 2; any other exception is a defect
    of this program and keeps its traceback.
    """
