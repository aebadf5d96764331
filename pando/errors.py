"""The exception tree of Pando and the one table that maps it to gRPC, HTTP and retries.

Messages are fixed sentences for the caller: no prompt text, no path, no foreign exception text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class Wire:
    """How an error crosses the wire: the gRPC status by name, so that a process without grpc can raise errors too."""

    status: str
    http: int
    retryable: bool

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        import grpc

        return grpc.StatusCode[self.status]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request and what is wrong with it."""

    field: str
    description: str


class PandoError(Exception):
    """Root of all errors that Pando raises on purpose.

    `reason` is an UPPER_SNAKE word for programs, `message` a sentence for people; `retry_after_s` is a hint in
    seconds, None where a retry cannot help; `error_id` names a log line where there is one.
    """

    wire: ClassVar[Wire] = Wire("INTERNAL", 500, False)
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        error_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.error_id = error_id


class ConfigError(PandoError):
    """A setting, file or environment that Pando cannot start with: one line, exit code 2."""

    wire = Wire("FAILED_PRECONDITION", 500, False)
    default_reason = "CONFIG"


class InvalidRequest(PandoError):
    """The request is malformed or asks for what no setting allows."""

    wire = Wire("INVALID_ARGUMENT", 400, False)
    default_reason = "INVALID_REQUEST"


class Unauthenticated(PandoError):
    """No credential, or one that is not known."""

    wire = Wire("UNAUTHENTICATED", 401, False)
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(PandoError):
    """The tenant is known and not entitled to this."""

    wire = Wire("PERMISSION_DENIED", 403, False)
    default_reason = "PERMISSION_DENIED"


class NotFound(PandoError):
    """A model, worker or prefix that does not exist for this tenant."""

    wire = Wire("NOT_FOUND", 404, False)
    default_reason = "NOT_FOUND"


class AlreadyExists(PandoError):
    """The tenant has a request of this id in flight."""

    wire = Wire("ALREADY_EXISTS", 409, False)
    default_reason = "ALREADY_EXISTS"


class ResourceExhausted(PandoError):
    """A limit of the tenant or of the fleet; `retry_after_s` says when to come again."""

    wire = Wire("RESOURCE_EXHAUSTED", 429, True)
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(PandoError):
    """No worker can serve the request now."""

    wire = Wire("UNAVAILABLE", 503, True)
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(PandoError):
    """The caller's time, or the server's maximum, ran out."""

    wire = Wire("DEADLINE_EXCEEDED", 504, False)
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(PandoError):
    """The caller went away or took the request back."""

    wire = Wire("CANCELLED", 499, False)
    default_reason = "CANCELLED"


class Unsupported(PandoError):
    """A part of the contract that this version does not serve."""

    wire = Wire("UNIMPLEMENTED", 501, False)
    default_reason = "UNSUPPORTED"


class InternalError(PandoError):
    """A defect of Pando; `error_id` finds it in the log."""

    wire = Wire("INTERNAL", 500, False)
    default_reason = "INTERNAL"


_BY_STATUS: dict[str, type[PandoError]] = {
    cls.wire.status: cls
    for cls in (
        ConfigError, InvalidRequest, Unauthenticated, PermissionDenied, NotFound, AlreadyExists,
        ResourceExhausted, Unavailable, DeadlineExceeded, Cancelled, Unsupported, InternalError,
    )
}  # fmt: skip


def error_type(code: grpc.StatusCode) -> type[PandoError]:
    """The error a client raises for a status code; `InternalError` for one that Pando never sends."""
    return _BY_STATUS.get(code.name, InternalError)
