"""The climbing game (Claus and Boutilier, AAAI 1998), written as text: a task of one state whose
values are known by hand, so a control of the study. CC and DC see the same, so neither can win.

    python climbing.py collm_cc --seed 1     # any of the three scripts, with its flags

Two agents name an action at once. (a, a) pays most, but whoever plays a against another action pays
dearly; from a random team the greedy way leads to (b, b) or (c, c).
"""

import sys
from importlib import import_module

import envs

PAYOFF = {  # of the actions of agent 0 and agent 1
    "a": {"a": 11.0, "b": -30.0, "c": 0.0},
    "b": {"a": -30.0, "b": 7.0, "c": 6.0},
    "c": {"a": 0.0, "b": 0.0, "c": 5.0},
}
ACTIONS = tuple(PAYOFF)
WORST = -30.0  # what an answer costs that is no action


class Climbing(envs.Task):
    """One item, one turn: the payoff of two actions, from 0 (the worst) to 1 (the best)."""

    name, agents, max_new_tokens = "climbing", (2,), 4

    def items(self):
        item = {"prompt": "Play a, b or c. A teammate plays at the same time."}
        return [item], [item] * 32  # held out: as many episodes as on other tasks

    def observe(self, item):
        return [item["prompt"]] * self.num_agents

    def score(self, item, actions):
        """Raw reward (payoff + 30) / 41, and info; played_a is the share of agents that did."""
        one, two = (action.strip() for action in actions)
        payoff = PAYOFF.get(one, {}).get(two, WORST)
        reward = (payoff - WORST) / (PAYOFF["a"]["a"] - WORST)
        info = {"score": 100 * reward, "success": float(reward == 1.0)}
        info |= {f"played_{x}": (one, two).count(x) / 2 for x in ACTIONS}
        return reward, info | {"valid": float(one in ACTIONS and two in ACTIONS)}

    def render(self, item, actions):
        return " and ".join(actions)


def value(policies):
    """Expected raw reward of two independent policies: {action: probability} for each agent.

    What lacks to a sum of 1 are answers that are no action; they earn nothing.
    """
    one, two = policies
    gain = sum(one[x] * two[y] * (PAYOFF[x][y] - WORST) for x in ACTIONS for y in ACTIONS)
    return gain / (PAYOFF["a"]["a"] - WORST)


envs.TASKS[Climbing.name] = Climbing

if __name__ == "__main__":
    script = import_module(sys.argv.pop(1))
    script.command_line(script.Args, script.main)
