"""How a candidate is scored: the evaluator API and the evaluators that ship with Meiosis."""
