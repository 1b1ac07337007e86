import { status } from '@grpc/grpc-js'

import { ChatTicketError } from './errors.js'

const FIRST_PAUSE_MS = 200
const MAX_PAUSE_MS = 10_000

const RETRYABLE_CODES: readonly status[] = [status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED]

// The service sets a reason with these codes. Without one they come from a proxy that has lost its
// server: nginx ends the stream by a reset, or without a status.
const RETRYABLE_CODES_WITHOUT_REASON: readonly status[] = [status.INTERNAL, status.UNKNOWN]

/** Whether the same call may succeed later. */
export function isRetryable(error: unknown): error is ChatTicketError {
  if (!(error instanceof ChatTicketError)) return false
  if (error.retrySeconds !== undefined || RETRYABLE_CODES.includes(error.code)) return true
  return RETRYABLE_CODES_WITHOUT_REASON.includes(error.code) && error.reason === ''
}

/** How long to wait before the next attempt: what the server asks for, plus exponential backoff with jitter. */
export function pauseMs(failures: number, error?: ChatTicketError): number {
  const longest = Math.min(FIRST_PAUSE_MS * 2 ** Math.min(failures, 10), MAX_PAUSE_MS)
  return (error?.retrySeconds ?? 0) * 1000 + Math.random() * longest
}
