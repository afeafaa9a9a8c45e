"""Trying candidates one at a time."""

from regard.primitives.search import one_at_a_time


def test_every_candidate_is_tried_once_and_the_best_comes_first():
    tried = []

    def score(candidate):
        tried.append(candidate)
        return {"a": 0, "b": 2.0, "c": 1, "d": 2.0}[candidate]

    assert one_at_a_time(score, "abcd") == [("b", 2.0), ("d", 2.0), ("c", 1.0), ("a", 0.0)]
    assert tried == list("abcd")
    assert one_at_a_time(score, ()) == []
