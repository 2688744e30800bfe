"""Rewards from a server: another process or machine scores the completions over HTTP."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from safe_train.config import ConfigError, SafeConfig

MAX_DELAY = 60.0  # seconds between two attempts
NOT_SENT = ("completion_ids", "trainer_state", "log_extra", "log_metric")  # what functions get beside the columns


class Server:
    """A server at an http or https URL.

    One that is down, busy (5xx, 429) or slower than `reward_timeout` is asked again `reward_retries` times, after
    1, 2, 4, ... seconds, a little less by chance so that several ranks do not return together.

    Raises:
        ConfigError: the URL has no host, or has a password in it, which would end up in logs.
        RuntimeError: no answer after the last attempt, or a refusal (any other status), at once.
    """

    def __init__(self, url: str, args: SafeConfig, batch_size: int = 64, first_delay: float = 1.0):
        self.url, self.timeout, self.attempts = url, args.reward_timeout, args.reward_retries + 1
        self.batch_size, self.first_delay = batch_size, first_delay
        parts = urlsplit(url)
        if not parts.hostname or parts.username:
            raise ConfigError("a server's URL must be http(s)://host[:port]/path, without a user or password")
        self.__name__ = f"{parts.netloc}{parts.path}".strip("/")
        self.opener = urllib.request.build_opener(NoRedirect)
        self.random = random.Random()  # not the run's: waiting must not change what a resumed run samples

    def post(self, body: bytes | None, path: str = "") -> bytes:
        """The body of the server's answer, asking until there is one; without a body a GET."""
        last = ""
        for attempt in range(self.attempts):
            if attempt > 0:
                delay = min(self.first_delay * 2 ** (attempt - 1), MAX_DELAY)
                time.sleep(delay * self.random.uniform(0.5, 1))
            request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                with error:
                    last = f"status {error.code} {error.reason}"
                    if error.code < 500 and error.code != 429:
                        raise RuntimeError(f"{self.url} refused: {last}, {error.read(200)!r}") from None
            except (OSError, http.client.HTTPException) as error:
                last = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"{self.url} gave no answer in {self.attempts} attempts of {self.timeout:g} s (last error: {last}). "
            "Check the server, or raise reward_timeout or reward_retries, and continue the run with --resume"
        )


class RewardServer(Server):
    """The reward of a server.

    It gets POST requests with the JSON object {"prompts": [...], "completions": [...], "columns": {name: [...]}}, where
    prompts and completions are text, or lists of chat messages, and columns are the data set's other fields. It
    answers {"scores": [...]} (or {"rewards": [...]}) with one number for each completion, or null where the reward does
    not apply.

    Raises:
        ValueError: an answer that is not of the form above; beside what `Server` raises.
    """

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        scores: list[float] = []
        columns = {name: values for name, values in columns.items() if name not in NOT_SENT}
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows = {name: values[part] for name, values in columns.items()}
            scores += self.score(prompts[part], completions[part], rows)
        return scores

    def score(self, prompts: list, completions: list, columns: dict[str, list]) -> list[float]:
        body = json.dumps({"prompts": prompts, "completions": completions, "columns": columns}).encode()
        answer = self.post(body)
        try:
            content = json.loads(answer)
            scores = content["scores"] if "scores" in content else content["rewards"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{self.url} must answer {{"scores": [one number a completion]}}, got {answer[:200]!r}'
            ) from None
        if not isinstance(scores, list) or not all(x is None or type(x) in (int, float) for x in scores):
            raise ValueError(f"{self.url} must answer with a list of numbers, got {str(scores)[:200]}")
        if len(scores) != len(completions):
            raise ValueError(f"{self.url} answered {len(scores)} scores for {len(completions)} completions")
        return scores


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are refusals: urllib would follow them with a GET, without the completions."""

    def redirect_request(self, *args: Any) -> None:
        return None
