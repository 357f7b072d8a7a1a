"""Metrics of the service in Prometheus' text format, at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of one service. Labels are the model, or the path and status of the answer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_model = {"labelnames": ("model",), "registry": self.registry}
        of_answer = {"labelnames": ("path", "status"), "registry": self.registry}
        self.answers = Counter("keifu_requests", "Requests answered", **of_answer)
        self.seconds = Histogram("keifu_request_seconds", "From request to answer's end", **of_answer, buckets=SECONDS)
        self.running = Gauge("keifu_running", "Texts being written", **of_model)
        self.waiting = Gauge("keifu_waiting", "Texts that wait to be written", **of_model)
        self.prompt = Counter("keifu_prompt_tokens", "Tokens of prompts", **of_model)
        self.generated = Counter("keifu_generated_tokens", "Tokens written; the rate is tokens per second", **of_model)
        self.guessed = Counter("keifu_guessed_tokens", "Tokens guessed to come next", **of_model)
        self.accepted = Counter("keifu_accepted_tokens", "Guessed tokens that came", **of_model)
        self.cached = Counter("keifu_cached_tokens", "Tokens of prompts found in the cache of earlier ones", **of_model)
        self.cache_used = Gauge("keifu_cache_used_ratio", "Share of the cache that is in use", **of_model)
        self.first_token = Histogram("keifu_first_token_seconds", "Time to first token", **of_model, buckets=SECONDS)
        self.loaded_bytes = Gauge("keifu_loaded_bytes", "Weights in memory", **of_model)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' format."""
        return generate_latest(self.registry)
