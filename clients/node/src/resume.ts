import { setTimeout as sleep } from 'node:timers/promises'

import { status } from '@grpc/grpc-js'

import { isRetryable, pauseMs } from './backoff.js'
import { ChatTicketError } from './errors.js'

// A token may expire on its way to the server. After this many expired tokens in a row the next one
// ends the stream.
const MAX_EXPIRED_TOKENS = 3

/** What has been delivered to the caller, over all of the streams. */
export interface Progress<Response, Item> {
  /** Whether nothing is left to deliver. */
  readonly hasEnded: boolean
  /** What to deliver for a response. */
  items(response: Response): readonly Item[]
  /** The server ended the stream without an error. */
  onStreamEnd(): void
  /** What to deliver at last when the session is not found. Empty: that is an error. */
  onNotFound(): readonly Item[]
}

/** A break of the stream, and when it is resumed. */
export interface Break {
  failures: number
  pauseMs: number
  error: ChatTicketError | undefined
  message: string
}

export interface ResumeOptions {
  /** Whether an expired token can be replaced by a new one. */
  renewsToken: boolean
  /** Ends the streams and the pauses. */
  signal: AbortSignal
  /** A new stream is started when nothing arrives for this long. */
  silenceMs: number
  /** How long to try without an item to deliver. */
  timeoutMs?: number | undefined
  onBreak?: ((broken: Break) => void) | undefined
}

/** What a stream delivers, and those that replace it when it breaks. */
export async function* resumed<Response, Item>(
  start: (signal: AbortSignal) => AsyncGenerator<Response, void, void>,
  progress: Progress<Response, Item>,
  { renewsToken, signal, silenceMs, timeoutMs = Infinity, onBreak }: ResumeOptions,
): AsyncGenerator<Item, void, void> {
  let expiredTokens = 0
  let lastItem = performance.now()
  for (let failures = 0; ; failures += 1) {
    const silence = new AbortController()
    const responses = start(AbortSignal.any([signal, silence.signal]))
    let failure: ChatTicketError | undefined
    let message = ''
    try {
      for (;;) {
        const timer = setTimeout(() => silence.abort(), silenceMs)
        const { done, value: response } = await responses.next().finally(() => clearTimeout(timer))
        if (done) {
          message = 'the stream ended'
          progress.onStreamEnd()
          break
        }
        expiredTokens = 0
        for (const item of progress.items(response)) {
          failures = 0
          yield item
          lastItem = performance.now()
        }
        if (progress.hasEnded) break
      }
      if (progress.hasEnded) return
    } catch (error) {
      signal.throwIfAborted()
      if (silence.signal.aborted) {
        message = `the server sent nothing for ${silenceMs} ms`
      } else if (!(error instanceof ChatTicketError)) {
        throw error
      } else {
        if (error.code === status.NOT_FOUND) {
          const last = progress.onNotFound()
          if (last.length === 0) throw error
          yield* last
          return
        }
        const isExpired = renewsToken && error.reason === 'CREDENTIAL_EXPIRED'
        expiredTokens = isExpired ? expiredTokens + 1 : 0
        if (!isRetryable(error) && (!isExpired || expiredTokens > MAX_EXPIRED_TOKENS)) throw error
        failure = error
        message = error.message
      }
    } finally {
      await responses.return()
    }
    const pause = pauseMs(failures, failure)
    if (performance.now() + pause > lastItem + timeoutMs) {
      throw failure ?? new ChatTicketError(status.DEADLINE_EXCEEDED, message)
    }
    onBreak?.({ failures, pauseMs: pause, error: failure, message })
    await sleep(pause, undefined, { signal }).catch(() => signal.throwIfAborted())
  }
}
