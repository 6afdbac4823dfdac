"""HTTP on one engine: OpenAI's API and SGLang's `/generate`. It talks to an EngineClient, never to an Engine."""

from kvtool.server.lifecycle import run

__all__ = ["run"]
