"""The search of hnswlib done again on its own graph, to count the keys that it scores, which it does not tell."""

import heapq
import statistics

import numpy as np


def keys_scored(index, asked, k, effort, scanned):
    """The mean number of keys that a search scored, `scanned` where the index tells."""
    if (scanned >= 0).all():
        return scanned.float().mean().item()
    walk = Walk(index.own)
    return statistics.mean(walk.search(query, k, effort)[1] for query in asked.numpy())


class Walk:
    """An index of hnswlib as lists of links; `search` is what it does, by its paper (algorithms 2 and 5)."""

    def __init__(self, own):
        state = own.__getstate__()[0]
        count, size = state["cur_element_count"], state["size_data_per_element"]
        rows = state["data_level0"].view(np.uint8)[: count * size].reshape(count, size)
        self.links = _lists(rows[:, : state["offset_data"]])
        self.keys = rows[:, state["offset_data"] : state["label_offset"]].copy().view(np.float32)
        self.labels = rows[:, state["label_offset"] :].copy().view(np.int64)[:, 0]
        self.entry, self.levels = state["enterpoint_node"], state["max_level"]
        above, width, at = state["link_lists"].view(np.uint8), state["size_links_per_element"], 0
        self.above = {}
        for key, level in enumerate(state["element_levels"][:count]):
            for step in range(level):
                self.above[key, step + 1] = _lists(above[None, at : at + width])[0]
                at += width

    def search(self, query, k, effort):
        """(ids, how many inner products were taken)."""
        best, taken = self.entry, 1
        nearest = self.keys[best] @ query
        for level in range(self.levels, 0, -1):
            moved = True
            while moved:
                links = self.above[best, level]
                scores = self.keys[links] @ query
                taken += len(links)
                moved = len(links) > 0 and scores.max() > nearest
                if moved:
                    best, nearest = links[scores.argmax()], scores.max()
        room = max(k, effort)
        taken += 1
        seen, ahead, found = {best}, [(-nearest, best)], [(nearest, best)]
        while ahead:
            score, key = heapq.heappop(ahead)
            if -score < found[0][0]:
                break
            new = [x for x in self.links[key].tolist() if x not in seen]
            seen.update(new)
            taken += len(new)
            for other, value in zip(new, self.keys[new] @ query, strict=True):
                if len(found) < room or value > found[0][0]:
                    heapq.heappush(ahead, (-value, other))
                    heapq.heappush(found, (value, other))
                    if len(found) > room:
                        heapq.heappop(found)
        ranked = sorted(found, reverse=True)[:k]
        return [int(self.labels[key]) for _, key in ranked], taken


def _lists(rows):
    """Lists of links from rows of bytes: how many, then which."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    return [row[1 : 1 + (row[0] & 0xFFFF)].astype(np.int64) for row in words]
