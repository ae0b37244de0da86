"""The Game of Life laboratory: how large a network must be to learn a rule, and how small the rule is once learnt.

After Springer and Kenyon 2020, "It's Hard for Neural Networks To Learn the Game of Life" (arXiv 2009.01398). Truth is exact
here: a network has learnt n steps if it is right in every neighbourhood there is, 2^9 of one step and 2^25 of two.

Letters of this package, besides the project's T (tokens: cells of all boards) and E (experts):

    Q  networks trained at once, which share nothing
    N  boards                     C  cells of a board
    I  channels in                O  channels out
    P  parameters of a network
"""
