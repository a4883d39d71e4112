"""Translation of S3 errors: whether a retry may help, and which StoreError they become. Does not import botocore.

Messages contain error codes only: a server's text may repeat request headers, and with them credentials.
"""

from __future__ import annotations

from stagecoach_api.names import ENV_CREDENTIALS_DIR
from stagecoach_api.stores.base import (
    AccessDenied,
    InvalidLocation,
    NotFound,
    Replaced,
    StoreError,
    Unreachable,
    public_endpoint,
)

# 408 request time-out, 429 too many requests, 5xx server errors except 501 (not implemented).
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "BadDigest",  # the server's checksum shows that the bytes were damaged in transit
    "ConditionalRequestConflict",  # another conditional write of the key is in progress; the next attempt gets 412
    "OperationAborted",
}
# Names of botocore's and urllib3's classes, since botocore is not imported here; `_Truncated` is that of `s3.py`.
_TRANSIENT_ERRORS = {
    "ConnectionError",
    "EndpointConnectionError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "HTTPClientError",
    "IncompleteRead",
    "ProtocolError",
    "ResponseParserError",
    "_Truncated",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "RefreshWithMFAUnsupportedError",
}
# A redirect to another region, and a service that is not S3 or lacks the operation.
_WRONG_PLACE_STATUS = {301, 307, 308, 405, 501}
# `400` is the code of a HEAD, whose answer has no body: botocore asks for the region of a bucket with one.
_WRONG_PLACE_CODES = {"AuthorizationHeaderMalformed", "InvalidBucketName", "PermanentRedirect", "400"}
_KMS = "KMS."
"""Beginning of the codes of a disabled, deleted or foreign key that S3 decrypts an object with."""
_WRONG_SETTINGS = {"ParamValidationError", "InvalidRegionError", "NoRegionError", "UnknownEndpointError", "ValueError"}
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
}
_WHERE = (
    f"credentials are read from the folder in {ENV_CREDENTIALS_DIR}, else from where the AWS SDK looks: the "
    "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the credentials file (AWS_SHARED_CREDENTIALS_FILE or "
    "~/.aws/credentials, profile AWS_PROFILE), then the web or machine identity"
)


def error_code(error: BaseException) -> str:
    """Return S3's error code, such as `NoSuchKey`; empty if the error is not a response of the server."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def error_status(error: BaseException) -> int:
    """Return the HTTP status; 0 if the error is not a response of the server."""
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def is_absent(error: BaseException) -> bool:
    """Return whether the server reported that the key, the bucket or the upload does not exist."""
    return error_status(error) == 404


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed if it is retried."""
    status = error_status(error)
    if status:
        return status in _TRANSIENT_STATUS or error_code(error) in _TRANSIENT_CODES
    return type(error).__name__ in _TRANSIENT_ERRORS or isinstance(error, ConnectionError | TimeoutError)


def store_error(error: Exception, key: str, uri: str, endpoint: str | None) -> StoreError:
    """Return the StoreError for an error that botocore raised in the last attempt."""
    status = error_status(error)
    where = public_endpoint(endpoint) if endpoint else "AWS"
    if status:
        return _response_error(error, key, uri, f"{where} answered {status} {error_code(error)}".rstrip())
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        return AccessDenied(key, f"no usable credentials for {uri} ({name}); {_WHERE}")
    # A TLS error is not retried, because certificates do not change in seconds, but means the same: not reachable.
    if is_transient(error) or "SSL" in name:
        return Unreachable(key, f"{uri} cannot be reached ({where}: {name}); check endpoint and network")
    if name in _WRONG_SETTINGS:
        return InvalidLocation(key, f"{uri} cannot be used ({where}: {name}); check bucket, `endpoint` and `region`")
    return StoreError(key, f"the request failed ({where}: {name})")


def _response_error(error: Exception, key: str, uri: str, answer: str) -> StoreError:
    denied = _denial(error_code(error), error_status(error), uri, answer)
    if denied:
        return AccessDenied(key, denied)
    code, status = error_code(error), error_status(error)
    if status == 404:
        what = "the bucket does not exist" if code == "NoSuchBucket" else "there is no such object"
        return NotFound(key, f"{what} in {uri} ({answer})")
    if status == 412:
        return Replaced(key, f"the object was replaced while it was read ({answer})")
    if is_transient(error):
        return Unreachable(key, f"{uri} kept failing ({answer}); the server is overloaded or broken, try again later")
    if status in _WRONG_PLACE_STATUS or code in _WRONG_PLACE_CODES:
        return InvalidLocation(key, f"{uri} cannot be used ({answer}); check bucket, `endpoint` and `region`")
    return StoreError(key, f"the request failed ({answer})")


def _denial(code: str, status: int, uri: str, answer: str) -> str:
    """Return the message for an answer that denies access; empty if it does not."""
    if code in _WRONG_CREDENTIALS:
        return f"wrong credentials for {uri} ({answer}); {_WHERE}"
    if code.startswith(_KMS):
        return f"{uri} cannot decrypt the object ({answer}); check the key and its policy"
    if status in (401, 403):
        return f"access to {uri} is denied ({answer}): wrong credentials, or a missing permission; {_WHERE}"
    return ""
