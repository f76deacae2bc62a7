"""Training agents that speak OpenAI's API: the endpoint they talk to, and the generate function that runs them."""

from miles_rollout.agents.endpoint import MODEL_NAME, Endpoint
from miles_rollout.agents.rollout import Agent, agent_rollout, load_agent

__all__ = ["MODEL_NAME", "Agent", "Endpoint", "agent_rollout", "load_agent"]
