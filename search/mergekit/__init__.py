"""mergekit's files, both ways: merge files become recipes, recipes merge files, and evolve files search configs.

Semantics are those of mergekit 0.1.5. What it would ignore without a word is an error here, or a note.
"""
