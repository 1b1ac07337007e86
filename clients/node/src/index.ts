export { credentials, Metadata, status } from '@grpc/grpc-js'

export type { Calls, CallOptions, StreamCall, UnaryCall } from './calls.js'
export { ChatTicketClient, type RetryOptions } from './client.js'
export { ChatTicketError, fromServiceError, type ErrorDetail, type Violation } from './errors.js'
export type { MessagesOfOptions } from './messages.js'
export { channelOptions, type ClientOptions, type Token } from './options.js'
export type { WatchEvent, WatchInterruption, WatchOptions } from './watch.js'

export * from './generated/chat_ticket/v1/chat_attachment.js'
export * from './generated/chat_ticket/v1/chat_message.js'
export * from './generated/chat_ticket/v1/chat_session.js'
export * from './generated/chat_ticket/v1/chat_ticket.js'
export * from './generated/chat_ticket/v1/resources.js'
