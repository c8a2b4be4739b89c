"""A server that speaks vLLM's JSON, as far as TRL's client reads it, and samples by our own hard rollout.

TRL's own `VLLMGeneration` and `VLLMClient` run against it, over HTTP. Only what needs NCCL or vLLM itself is replaced.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from trainers.tiny import dataset, word_tokenizer
from trl.generation import vllm_client, vllm_generation

from softrl.data.prompts import prompt_ids
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts


class Engine:
    """The served model, and samples that a trainer without an engine would draw: the same streams, the same weights.

    `step_of_push` is the step whose streams are taken after so many pushes of weights.
    """

    def __init__(self, model, step_of_push=lambda pushes: pushes - 1, sample=None, seed=42):
        self.model = model.requires_grad_(False)
        self.step_of_push, self.sample, self.seed = step_of_push, sample or self._ordinary, seed
        self.pushes, self.requests = 0, []
        tokenizer = word_tokenizer()
        self.indices = {tuple(prompt_ids(text, tokenizer)): i for i, text in enumerate(dataset()["prompt"])}

    @torch.no_grad()
    def load(self, metadata, named_params):
        """Tensor by tensor, since adapters are taken out of the weights again after the last one."""
        own = dict(self.model.named_parameters())
        assert [name for name, _, _ in metadata] == list(own)
        for (announced, dtype, shape), (name, value) in zip(metadata, named_params, strict=True):
            assert (announced, dtype, shape) == (name, str(value.dtype).removeprefix("torch."), list(value.shape))
            own[name].copy_(value)
        self.pushes += 1

    def completions(self, prompts, request):
        """Token ids of `n` completions a prompt, through their end."""
        self.requests.append(request)
        longest = max(map(len, prompts))
        ids = torch.tensor([[2] * (longest - len(row)) + list(row) for row in prompts])
        mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in prompts])
        indices = [self.indices[tuple(row)] for row in prompts]
        random = SequenceRandom.keyed(self.seed, self.step_of_push(self.pushes), indices, request["n"])
        policy = Policy(self.model, request["temperature"])
        return self.sample(policy, Prompts(ids, mask), random, request)

    def _ordinary(self, policy, prompts, random, request):
        truncation = Truncation(1, request["top_p"], request["min_p"])
        eos_ids = tuple(request["stop_token_ids"])
        sampled = hard_rollout(policy, prompts, truncation, random, request["max_tokens"], request["n"], eos_ids)
        return rows_of(sampled)


def rows_of(rollout):
    return [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)]


@contextmanager
def serving(engine, monkeypatch):
    """Serve it; gives the URL. TRL's client is told that vLLM is there."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"/health": {}, "/v1/models": {"data": [{"id": "tiny"}]}}[self.path])

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            if self.path == "/v1/completions":
                request.setdefault("n", 1)
                rows = engine.completions(request["prompt"], request)
                prompts = [ids for ids in request["prompt"] for _ in range(request["n"])]
                self.answer(
                    {
                        "choices": [
                            {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": None}
                            for prompt, ids in zip(prompts, rows, strict=True)
                        ]
                    }
                )
            else:
                self.answer({"/reset_prefix_cache": {"success": True}}[self.path])

        def log_message(self, *args):
            pass

    pretend_vllm(monkeypatch)
    monkeypatch.setattr(vllm_generation, "VLLMClient", client_for(engine))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def pretend_vllm(monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr("softrl.trainers.vllm_config.vllm_is_installed", lambda: True)


def client_for(engine):
    """TRL's client with a call in place of NCCL."""

    class Client(vllm_client.VLLMClient):
        def init_communicator(self, device=0):
            self.communicator = None

        def update_named_params(self, metadata, named_params):
            engine.load(metadata, named_params)

    return Client


class Colocated:
    """`vllm.LLM` as TRL's colocate mode uses it."""

    def __init__(self, engine):
        self.engine, self.settings = engine, None

    def __call__(self, **settings):
        self.settings = settings
        return self

    @property
    def llm_engine(self):
        return self

    model_executor = driver_worker = model_runner = llm_engine

    @property
    def model(self):
        return self

    @torch.no_grad()
    def load_weights(self, named_params):
        for name, value in named_params:
            dict(self.engine.model.named_parameters())[name].copy_(value)

    def reset_prefix_cache(self):
        self.engine.pushes += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        assert sampling_params["n"] == 1  # repeated prompts, here two in a row
        ids = [row["prompt_token_ids"] for row in prompts]
        distinct = ids[:: self.engine.num_samples]
        rows = self.engine.completions(distinct, {**sampling_params, "n": self.engine.num_samples})
        return [_Output(prompt, [_Completion(row)]) for prompt, row in zip(ids, rows, strict=True)]


class _Output:
    def __init__(self, prompt_token_ids, outputs):
        self.prompt_token_ids, self.outputs = prompt_token_ids, outputs


class _Completion:
    logprobs = None

    def __init__(self, token_ids):
        self.token_ids = token_ids
