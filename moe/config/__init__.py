"""Settings of a run: their classes, their rules, and the one way to load them.

schema      a run: every setting, as frozen dataclasses, from the next four
base        how settings are made
network     of the model
corpus      of the data
training    of the loop, the layout, evaluation, saving, reporting, prices
load        recipe, run.json, dict or Run, with overrides, to a checked Run
check       rules between fields
layout      which rank holds what, and its rules
registry    routers by name; running a user's Python file
tree        the shape of the config classes: what each place may hold
overrides   a.b.c=value
validate    types and ranges, by pydantic
command     the arguments of `moe train` and `python -m moe.train`
words       wording shared by all messages
"""
