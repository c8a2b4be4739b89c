"""`ranks.py`, whose cases may put their trainers on a stand-in for a vLLM server, in rank 0's process: `served`."""

import os

import pytest
from engines import ranks
from trainers import tiny


def on_stand_in(make):
    running = []  # for as long as the process lives

    def make_served(*args, served=False, **settings):
        if not served:
            return make(*args, **settings)
        from helpers import llama
        from trainers.vllm_stub import Engine, pretend_vllm, serving

        monkeypatch = pytest.MonkeyPatch()
        pretend_vllm(monkeypatch)
        url = None  # the other ranks never ask it
        if int(os.environ.get("RANK", "0")) == 0:
            running.append(serving(Engine(llama(seed=9).float()), monkeypatch))
            url = running[-1].__enter__()
        server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 20.0}
        return make(*args, **server, **settings)

    return make_served


if __name__ == "__main__":
    tiny.make = on_stand_in(tiny.make)
    ranks.main()
