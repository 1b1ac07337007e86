import { status, type ServiceError } from '@grpc/grpc-js'

import { Any } from './generated/google/protobuf/any.js'
import {
  BadRequest,
  DebugInfo,
  ErrorInfo,
  Help,
  LocalizedMessage,
  PreconditionFailure,
  QuotaFailure,
  RequestInfo,
  ResourceInfo,
  RetryInfo,
} from './generated/google/rpc/error_details.js'
import { Status } from './generated/google/rpc/status.js'

interface DetailTypes {
  'google.rpc.BadRequest': BadRequest
  'google.rpc.DebugInfo': DebugInfo
  'google.rpc.ErrorInfo': ErrorInfo
  'google.rpc.Help': Help
  'google.rpc.LocalizedMessage': LocalizedMessage
  'google.rpc.PreconditionFailure': PreconditionFailure
  'google.rpc.QuotaFailure': QuotaFailure
  'google.rpc.RequestInfo': RequestInfo
  'google.rpc.ResourceInfo': ResourceInfo
  'google.rpc.RetryInfo': RetryInfo
}

const DETAIL_TYPES: { [Type in keyof DetailTypes]: { decode(bytes: Uint8Array): DetailTypes[Type] } } = {
  'google.rpc.BadRequest': BadRequest,
  'google.rpc.DebugInfo': DebugInfo,
  'google.rpc.ErrorInfo': ErrorInfo,
  'google.rpc.Help': Help,
  'google.rpc.LocalizedMessage': LocalizedMessage,
  'google.rpc.PreconditionFailure': PreconditionFailure,
  'google.rpc.QuotaFailure': QuotaFailure,
  'google.rpc.RequestInfo': RequestInfo,
  'google.rpc.ResourceInfo': ResourceInfo,
  'google.rpc.RetryInfo': RetryInfo,
}

/** One detail of an error. A detail of any other type stays a packed `Any`. */
export type ErrorDetail =
  | { [Type in keyof DetailTypes]: { type: Type; value: DetailTypes[Type] } }[keyof DetailTypes]
  | { type: 'google.protobuf.Any'; value: Any }

/** What is wrong with one field of a request, such as `message.metadata_json`. */
export interface Violation {
  field: string
  description: string
}

/**
 * A call that failed. Its `cause` is the error of grpc-js.
 *
 * A write that failed with UNAVAILABLE, DEADLINE_EXCEEDED or CANCELLED, or without a `reason`, may
 * have been executed. Repeat it with the same ids, for example with `ChatTicketClient.retry`.
 */
export class ChatTicketError extends Error {
  override readonly name = 'ChatTicketError'
  /** The gRPC status code: a value of `status`. */
  readonly code: status
  /** The name of the code, such as `NOT_FOUND`. */
  readonly codeName: string
  /** The text of the status alone. `message` has the reason before it. */
  readonly statusMessage: string
  /**
   * The machine-readable reason, such as `SESSION_ARCHIVED`. Empty when the error does not come from
   * the service but from gRPC or a proxy.
   */
  readonly reason: string
  /** Values that belong to the reason, such as the `quota` that is used up. */
  readonly metadata: Readonly<Record<string, string>>
  /** Every field of the request that is wrong, for INVALID_ARGUMENT. */
  readonly violations: readonly Violation[]
  /** After how many seconds the same call may succeed. Undefined when the service does not send it. */
  readonly retrySeconds: number | undefined
  /** All details that the service sent. */
  readonly details: readonly ErrorDetail[]

  constructor(code: status, statusMessage: string, details: readonly ErrorDetail[] = [], options?: ErrorOptions) {
    let reason = ''
    let metadata: Record<string, string> = {}
    let violations: Violation[] = []
    let retrySeconds: number | undefined
    for (const detail of details) {
      if (detail.type === 'google.rpc.ErrorInfo') {
        reason = detail.value.reason
        metadata = detail.value.metadata
      } else if (detail.type === 'google.rpc.BadRequest') {
        violations = detail.value.fieldViolations.map(({ field, description }) => ({ field, description }))
      } else if (detail.type === 'google.rpc.RetryInfo') {
        const { seconds, nanos } = detail.value.retryDelay ?? { seconds: 0n, nanos: 0 }
        retrySeconds = Number(seconds) + nanos / 1e9
      }
    }
    const codeName = status[code] ?? String(code)
    super(`${reason || codeName}: ${statusMessage}`, options)
    this.code = code
    this.codeName = codeName
    this.statusMessage = statusMessage
    this.reason = reason
    this.metadata = metadata
    this.violations = violations
    this.retrySeconds = retrySeconds
    this.details = details
  }
}

/** Converts the error of a failed grpc-js call. */
export function fromServiceError(error: ServiceError): ChatTicketError {
  const [packed] = error.metadata?.get('grpc-status-details-bin') ?? []
  const details = Buffer.isBuffer(packed) ? decodeDetails(packed, error) : []
  return new ChatTicketError(error.code, error.details, details, { cause: error })
}

function decodeDetails(packed: Buffer, error: ServiceError): ErrorDetail[] {
  let decoded: Status
  try {
    decoded = Status.decode(packed)
  } catch {
    return []
  }
  // The service never sends a status that contradicts the call's, so this one does not come from it.
  if (decoded.code !== error.code || decoded.message !== error.details) return []
  return decoded.details.map(unpack)
}

function unpack(packed: Any): ErrorDetail {
  const type = packed.typeUrl.slice(packed.typeUrl.lastIndexOf('/') + 1)
  if (Object.hasOwn(DETAIL_TYPES, type)) {
    try {
      return { type, value: DETAIL_TYPES[type as keyof DetailTypes].decode(packed.value) } as ErrorDetail
    } catch {
      // The packed form below loses nothing.
    }
  }
  return { type: 'google.protobuf.Any', value: packed }
}
