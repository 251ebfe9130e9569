"""A machine for tests of what is measured: its clock moves only when something is called, by what the test says."""

import math
import random

from resfuse.bench import timing


class Clock:
    """Seconds that pass only when something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log=None, name=None):
        def run():
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


class Machine:
    """Stands in for interleave: callables run, and take the seconds that their names cost, on a drifting machine.

    Every call is slowed down by a drift, which the callables share, and by a noise of its own, both log-normal.
    """

    def __init__(self, costs=None, *, seed=0, speed=1.0, drift=0.0, noise=0.0):
        self.costs, self.speed, self.drift, self.noise = costs or {}, speed, drift, noise
        self.clock, self.random, self.calls = Clock(), random.Random(seed), 0
        self.level = 0.0

    def interleave(self, functions, **options):
        def slowed(name, function):
            def run():
                if self.calls % len(functions) == 0:
                    self.level = self.random.gauss(0, self.drift)
                self.calls += 1
                function()
                luck = self.level + self.random.gauss(0, self.noise)
                self.clock.now += self.costs.get(name, 1e-3) / self.speed * math.exp(luck)

            return run

        once = {**options, "seconds_per_sample": 0.0, "clock": self.clock}
        return timing.interleave({name: slowed(name, function) for name, function in functions.items()}, **once)
