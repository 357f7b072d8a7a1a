"""Learning from preferences and rewards: DPO, reward models, PPO and GRPO."""
