"""Memories kept outside of the model: computed ahead by the user encoder, read by the server.

``keys`` name records, ``encode`` and ``decode`` turn them into bytes and back (``record`` says which bytes), ``store``
keeps the bytes in named generations, in LMDB or Redis, and ``reader`` reads them online without ever raising. ``build``
makes the records of all users of a dataset, ``refresh`` those of users with new events.
"""
