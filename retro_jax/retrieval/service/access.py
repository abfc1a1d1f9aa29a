"""How a retrieval service is reached, as settings that can be passed on to worker processes."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from retro_jax.errors import UserError

if TYPE_CHECKING:
    from retro_jax.retrieval.service.client import RetrievalClient


@dataclasses.dataclass(frozen=True)
class Service:
    """A retrieval service to search in, instead of a database in this process.

    Attributes:
      addresses: "host:port" of its fronts, with commas.
      ca: PEM file of the authorities that vouch for them; None is plaintext.
      certificate, key: PEM files shown to a server that asks for them; both or none.
      token_file: a bearer token is the first line of it.
      seconds: deadline of one call.
      allow_plaintext: send the token without TLS to other machines.
    """

    addresses: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    token_file: str | None = None
    seconds: float = 120.0
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise UserError("the certificate shown to a service and its private key go together; give both")

    def connect(self) -> "RetrievalClient":
        """A client of the service; it connects when it is first used."""
        # Here, so that saying where a service is needs no gRPC.
        from retro_jax.retrieval.service.client import RetrievalClient
        from retro_jax.retrieval.service.security import ClientSecurity, Identity, read_tokens

        security = ClientSecurity(
            self.ca and Path(self.ca),
            Identity(Path(self.certificate), Path(self.key)) if self.certificate else None,
            read_tokens(self.token_file)[0] if self.token_file else None,
            self.allow_plaintext,
        )
        return RetrievalClient(self.addresses, security=security, seconds=self.seconds)
