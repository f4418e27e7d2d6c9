"""How the cost of a function grows: a ratio, which is the same on slow and on busy machines."""

import math
import time

LINEAR = 8  # of a text four times as long: 4 if the cost is linear, 16 if it is quadratic


def growth(function, text):
    """CPU time of function(text) over that of its first quarter: the best of tries that alternate,
    up to 20 of each, until the cost is seen to be linear."""
    texts = text[: len(text) // 4], text
    best = [math.inf, math.inf]
    for _ in range(20):
        for i in range(2):
            start = time.process_time()
            function(texts[i])
            best[i] = min(best[i], time.process_time() - start)
        if best[1] < LINEAR * best[0]:
            break
    return best[1] / best[0]
