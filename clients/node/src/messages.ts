import { status } from '@grpc/grpc-js'

import { ChatTicketError } from './errors.js'
import type { ListChatMessagesRequest, ListChatMessagesResponse } from './generated/chat_ticket/v1/chat_message.js'
import type { ChatMessage, ChatSession } from './generated/chat_ticket/v1/resources.js'
import type { Progress } from './resume.js'

export interface MessagesOfOptions {
  /** List the messages after this sequence. 0 by default. */
  afterSequence?: bigint | number | string | undefined
  /** How long to retry while nothing arrives. 60,000 by default. */
  timeoutMs?: number | undefined
  /** Ends the list, which then throws the reason of the signal. */
  signal?: AbortSignal | undefined
}

/** What has been delivered of the messages of a session. */
export class ListProgress implements Progress<ListChatMessagesResponse, ChatMessage> {
  hasEnded = false
  readonly #sessionId: string
  #sequence: bigint
  #session: ChatSession | undefined

  constructor(sessionId: string, afterSequence: bigint) {
    this.#sessionId = sessionId
    this.#sequence = afterSequence
  }

  get request(): Partial<ListChatMessagesRequest> {
    const request = { sessionId: this.#sessionId, afterSequence: this.#sequence }
    // As far as the first stream would have gone.
    return this.#session
      ? { ...request, beforeSequence: this.#session.revision + 1n, epoch: this.#session.epoch }
      : request
  }

  items({ session, messages }: ListChatMessagesResponse): readonly ChatMessage[] {
    if (session && this.#session && session.createTime?.getTime() !== this.#session.createTime?.getTime()) {
      // A later session with the same id: the listed one was deleted.
      throw new ChatTicketError(status.NOT_FOUND, 'the session was deleted meanwhile')
    }
    this.#session ??= session
    this.#sequence = messages.at(-1)?.sequence ?? this.#sequence
    return messages
  }

  onStreamEnd(): void {
    this.hasEnded = true
  }

  onNotFound(): readonly ChatMessage[] {
    return []
  }
}
