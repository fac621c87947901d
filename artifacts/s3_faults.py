"""What S3 answers, in words: whose fault it is and what to do next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from artifacts.errors import ArtifactError, IntegrityError, NotFoundError, StoreError, UnavailableError
from artifacts.s3_limit import LIMIT, OutOfTimeError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# A HEAD has no body, so that its codes are bare numbers.
_ABSENT: Final = ("NoSuchKey", "NotFound", "404")
_DENIED: Final = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403")
_CREDENTIALS: Final = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "RequestTimeTooSkewed",
)  # fmt: skip
# Said of the service's state and not of the request; a status of 500 and more says the same (S3's list of error codes).
_BUSY: Final = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "OperationAborted",
)
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500
_REGION: Final = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301")
_NO_CREDENTIALS: Final = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure (or: aws sso login)"
)
# What stands before the host in an address (RFC 3986, 3.2.1): a password, mostly.
_USER: Final = re.compile(r"(?<=://)[^/?#\s\"']*@")


@dataclass(frozen=True)
class Place:
    """Where requests go: the store's URI, its bucket, and the address of the endpoint (empty before it is known)."""

    uri: str
    bucket: str
    endpoint: str


def without_user(text: str) -> str:
    """Return a text with its addresses less their `user:password@`, which S3 has no use for and nobody should read."""
    return _USER.sub("", text)


def error_code(err: ClientError) -> str:
    """Return the code of a refused request, such as `NoSuchKey`."""
    return str(err.response.get("Error", {}).get("Code", ""))


def is_absent(code: str) -> bool:
    """Tell whether this code says that there is no such object."""
    return code in _ABSENT


@contextmanager
def s3_faults(find_place: Callable[[], Place], path: str) -> Iterator[None]:
    """Turn every error that boto3 raises in the block into one of this package's.

    `find_place` is asked afterwards, since the block may be what makes the client that knows the endpoint.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except OutOfTimeError as err:
        place = find_place()
        raise UnavailableError(
            f"{place.uri}: {path}: {place.endpoint} gave {err}; check the network and run again (what was to be written may or "
            f"may not be there), or raise {LIMIT}"
        ) from None
    except ClientError as err:
        raise _refused(find_place(), path, err) from err
    except BotoCoreError as err:
        raise _failed(find_place(), path, err) from err
    except Boto3Error as err:
        # A managed transfer wraps what happened.
        place, cause = find_place(), err.__context__
        if isinstance(cause, ClientError):
            raise _refused(place, path, cause) from err
        if isinstance(cause, BotoCoreError):
            raise _failed(place, path, cause) from err
        raise StoreError(f"{place.uri}: {path}: {err}") from err


def _refused(place: Place, path: str, err: ClientError) -> StoreError:
    code, where = error_code(err), f"{place.uri}: {path}"
    if code in _ABSENT:
        return NotFoundError(place.uri, path)
    said = err.response.get("Error", {}).get("Message", "") or code
    if code == "NoSuchBucket":
        option = "" if _is_aws(place.endpoint) else f" --endpoint-url {place.endpoint}"
        return StoreError(
            f"{place.uri}: there is no bucket {place.bucket!r} at {place.endpoint}; "
            f"make it with: aws s3 mb s3://{place.bucket}{option}"
        )
    if code in _DENIED:
        return StoreError(
            f"{where}: access denied ({said}); these credentials need s3:GetObject, s3:PutObject and s3:DeleteObject "
            f"on s3://{place.bucket}/*, and s3:ListBucket on the bucket (without it S3 says this of what is missing)"
        )
    if code in _CREDENTIALS:
        return StoreError(
            f"{where}: the credentials were refused ({said}); check them and the clock: {_NO_CREDENTIALS}"
        )
    if code in _REGION:
        return StoreError(f"{where}: the bucket is in another region ({said}); set AWS_REGION to the bucket's")
    if code == "PreconditionFailed":
        return UnavailableError(f"{where}: it changed while it was read; run again")
    if code == "NotImplemented":
        return StoreError(
            f"{where}: {place.endpoint} does not offer this ({said}); use a service that does (Amazon S3)"
        )
    status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    later = code in _BUSY or status == _TOO_MANY or status >= _SERVER_ERROR
    answered = f"{where}: {place.endpoint} answered {code}: {said}; run again, or ask who runs the service"
    return UnavailableError(answered) if later else StoreError(answered)


def _failed(place: Place, path: str, err: Exception) -> ArtifactError:
    from botocore import exceptions

    where = f"{place.uri}: {path}"
    credentials = (
        exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError,
        exceptions.NoAuthTokenError, exceptions.TokenRetrievalError, exceptions.SSOError, exceptions.LoginError,
    )  # fmt: skip
    if isinstance(err, credentials):
        return StoreError(f"{where}: no usable credentials ({err}); {_NO_CREDENTIALS}")
    if isinstance(err, exceptions.FlexibleChecksumError):
        return IntegrityError(f"{where}: {err}")
    if isinstance(err, exceptions.IncompleteReadError | exceptions.ConnectionError | exceptions.HTTPClientError):
        return UnavailableError(
            f"{where}: cannot reach {place.endpoint} ({err}); check the network, and AWS_ENDPOINT_URL_S3 if it is set"
        )
    return StoreError(f"{where}: {err}; check the AWS settings (AWS_PROFILE, AWS_REGION, ~/.aws/config)")


def _is_aws(endpoint: str) -> bool:
    return endpoint.rstrip("/").endswith((".amazonaws.com", ".amazonaws.com.cn"))
