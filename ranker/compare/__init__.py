"""`ranker compare CONFIG --out OUT`: which long-sequence method pays on a dataset, and at what cost.

A *cell* is one run: a method, a history length, a seed, and a value of each swept key. :mod:`~ranker.compare.plan`
makes the cells of a config, :mod:`~ranker.compare.running` trains and evaluates those that are not finished yet,
:mod:`~ranker.compare.cost` times the methods alone, :mod:`~ranker.compare.results` puts together one row a method and
length, and the rest writes the rows as tables and as a page.
"""
