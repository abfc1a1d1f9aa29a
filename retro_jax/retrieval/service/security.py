"""Who may talk to whom: TLS, mutual TLS, bearer tokens, and addresses that only this machine can reach."""

import dataclasses
import datetime
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from retro_jax.errors import UserError

_HEADER = "authorization"
_SCHEME = "Bearer "


@dataclasses.dataclass(frozen=True)
class Identity:
    """A certificate chain and its private key, PEM files.

    Attributes:
      certificate, key: the files.
    """

    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """(certificate chain, key) as they are now, checked.

        Raises:
          UserError: unreadable, expired, not valid yet, or a key of another certificate.
        """
        chain, key = _read(self.certificate), _read(self.key)
        try:
            certificate = x509.load_pem_x509_certificates(chain)[0]
        except ValueError:
            raise UserError(f"{self.certificate}: not a certificate in PEM") from None
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError):
            raise UserError(f"{self.key}: not a private key in PEM without a password") from None
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        ours, theirs = (
            public.public_bytes(serialization.Encoding.DER, spki)
            for public in (private.public_key(), certificate.public_key())
        )
        if ours != theirs:
            raise UserError(f"{self.key} is not the key of {self.certificate}")
        now = datetime.datetime.now(datetime.UTC)
        if certificate.not_valid_after_utc < now:
            raise UserError(f"{self.certificate}: expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        if certificate.not_valid_before_utc > now:
            raise UserError(
                f"{self.certificate}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            )
        return chain, key

    def expiry(self) -> float:
        """Seconds of the epoch at which the certificate ends."""
        return x509.load_pem_x509_certificates(_read(self.certificate))[0].not_valid_after_utc.timestamp()


@dataclasses.dataclass(frozen=True)
class ServerSecurity:
    """How a server protects itself.

    Attributes:
      identity: for TLS; None is plaintext.
      client_ca: PEM file of the authorities whose clients are let in (mutual TLS); None lets everyone in.
      tokens: one of them must come with every call; none given: no token is asked for.
      allow_plaintext: listen without TLS where other machines can reach it.
    """

    identity: Identity | None = None
    client_ca: Path | None = None
    tokens: tuple[str, ...] = ()
    allow_plaintext: bool = False

    def check_address(self, host: str) -> None:
        """Refuses to be reached from elsewhere without TLS.

        Raises:
          UserError: the host is not of this machine alone, there is no TLS, and nobody allowed it.
        """
        if self.client_ca and not self.identity:
            raise UserError("client certificates need TLS: give the server's own certificate and key too")
        if not (self.identity or self.allow_plaintext or is_loopback(host)):
            raise UserError(
                f"will not listen at {host} without TLS: give --tls_certificate and --tls_key, or say "
                "--allow_plaintext where the network itself is protected"
            )

    def credentials(self) -> grpc.ServerCredentials | None:
        """For a secure port, reading the files again when they change; None for plaintext.

        Raises:
          UserError: see `Identity.read`; or authorities that are no certificates.
        """
        if self.identity is None:
            return None
        seen = [self._marks()]

        def configuration() -> grpc.ServerCertificateConfiguration:
            ca = _authorities(self.client_ca) if self.client_ca else None
            chain, key = self.identity.read()
            return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=ca)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Asked at every connection; None goes on with what was given before."""
            try:
                if (marks := self._marks()) == seen[0]:
                    return None
                renewed = configuration()
            except (UserError, OSError):
                return None  # half written: the next connection asks again
            seen[0] = marks
            return renewed

        return grpc.dynamic_ssl_server_credentials(
            configuration(), fetch, require_client_authentication=self.client_ca is not None
        )

    def admits(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """Whether a call's metadata has a token that is asked for; compared in constant time."""
        if not self.tokens:
            return True
        given = next((value for key, value in metadata if key == _HEADER), "")
        encoded = given if isinstance(given, bytes) else given.encode()
        # All are compared, so that the time does not say which came near.
        return any([hmac.compare_digest(encoded, (_SCHEME + token).encode()) for token in self.tokens])

    def _marks(self) -> list[tuple[int, int]]:
        files = [self.identity.certificate, self.identity.key, *([self.client_ca] if self.client_ca else [])]
        return [(os.stat(file).st_mtime_ns, os.stat(file).st_ino) for file in files]


@dataclasses.dataclass(frozen=True)
class ClientSecurity:
    """How a client reaches a server.

    Attributes:
      ca: PEM file of the authorities that vouch for the server; None is plaintext.
      identity: shown to a server that asks for it (mutual TLS).
      token: sent with every call.
      allow_plaintext: send the token without TLS where other machines can read it.
    """

    ca: Path | None = None
    identity: Identity | None = None
    token: str | None = None
    allow_plaintext: bool = False

    def channel(self, address: str, options: Sequence[tuple[str, object]]) -> grpc.Channel:
        """A channel to host:port.

        Raises:
          UserError: a file that cannot be read, an expired certificate, an identity without an authority, a token that
            others could read.
        """
        if self.ca is None:
            if self.identity is not None:
                raise UserError("a client certificate needs TLS: give the authority of the server too")
            if self.token and not (self.allow_plaintext or is_loopback(address.rpartition(":")[0])):
                raise UserError(
                    f"will not send a token to {address} without TLS: give the authority of the server (--service_ca; "
                    "of a front, --backend_ca), or say --service_allow_plaintext (of a front, --allow_plaintext) "
                    "where the network itself is protected"
                )
            return grpc.insecure_channel(address, options)
        chain, key = self.identity.read() if self.identity else (None, None)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(_authorities(self.ca), key, chain), options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((_HEADER, _SCHEME + self.token),) if self.token else ()


def read_tokens(path: str | os.PathLike) -> tuple[str, ...]:
    """Bearer tokens of a file, one a line, so that an old and a new one are good at a time.

    Raises:
      UserError: none in it, or one with characters that a header cannot hold.
    """
    tokens = tuple(line.strip() for line in _read(Path(path)).decode(errors="replace").splitlines() if line.strip())
    if not tokens:
        raise UserError(f"{path}: no token in it; expected one a line")
    if any(not token.isascii() or not token.isprintable() or " " in token for token in tokens):
        raise UserError(f"{path}: a token has characters other than printable ASCII without spaces")
    return tokens


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _authorities(path: Path) -> bytes:
    """A file of certificates, checked: gRPC would only say that a port or a connection cannot be had."""
    data = _read(path)
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UserError(f"{path}: no certificates in PEM in it; expected those of the authorities") from None
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
