"""PPO of stable-baselines3, which balances a pole: the policy and its optimizer fused by two lines.

It trains twice, without the lines and with them, the rounds of both in turns. Most of a round is spent in the
environment and in the trainer's own Python, which fusing leaves as they are: expect little.
"""

import sys
from statistics import mean, median
from time import perf_counter

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

import fastmlp

ROUNDS = int(sys.argv[1]) if sys.argv[1:] else 6  # each of 2,048 steps in the environment, and 320 updates

agents = {name: PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu") for name in ("stock", "fastmlp")}
fastmlp.fuse(agents["fastmlp"].policy)
fastmlp.fuse(agents["fastmlp"].policy.optimizer)

observations = 0.1 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
seconds: dict[str, list[float]] = {name: [] for name in agents}
for number in range(ROUNDS):
    for name, agent in agents.items():
        set_random_seed(number)  # both draw the same
        start = perf_counter()
        agent.learn(2048, reset_num_timesteps=False)
        seconds[name].append(perf_counter() - start)
    if number == 0:  # later an action may differ by rounding, and from there on the whole episode
        with torch.no_grad():
            stock, fused = (agent.policy.predict_values(observations) for agent in agents.values())
        print(f"largest difference of a value after the first round: {(stock - fused).abs().max():.1e}")

for name, agent in agents.items():
    reward = mean(episode["r"] for episode in agent.ep_info_buffer)
    print(f"{name:8} {median(seconds[name]):.2f} s a round, mean reward {reward:.1f}")
stock, fused = (median(own) for own in seconds.values())
print(f"saved: {1 - fused / stock:.0%} of the time, {stock / fused:.2f} times as fast")
