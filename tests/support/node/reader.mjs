// Reads and writes in a loop, with the service config or without.
//
//   node reader.mjs ADDRESSES TENANT SESSION SERVICE_CONFIG
//
// prints a line when it starts and stops when its input ends. Then it prints how many calls of each
// kind ended with which status, which tests/operations/test_service_config.py checks.
import { fileURLToPath } from 'node:url'

import grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const [addresses, tenant, session_id, config] = process.argv.slice(2)

const definition = loadSync(
  ['chat_ticket/v1/chat_session.proto', 'chat_ticket/v1/chat_message.proto'],
  { includeDirs: [fileURLToPath(new URL('../../../protos', import.meta.url))], keepCase: true },
)
const { chat_ticket: { v1 } } = grpc.loadPackageDefinition(definition)

const credentials = grpc.credentials.createInsecure()
const options = { 'grpc.enable_http_proxy': 0, 'grpc.service_config': config }
const sessions = new v1.ChatSessionService(addresses, credentials, options)
const messages = new v1.ChatMessageService(addresses, credentials, options)

const metadata = new grpc.Metadata()
metadata.set('x-tenant-id', tenant)

/** The status of a unary call. */
function call(client, method, request) {
  return new Promise((resolve) => {
    client[method](request, metadata, { deadline: Date.now() + 10_000 }, (error) =>
      resolve(error?.code ?? 0))
  })
}

/** The status of a stream. */
function stream(client, method, request) {
  return new Promise((resolve) => {
    client[method](request, metadata, { deadline: Date.now() + 10_000 })
      .on('data', () => {})
      .on('error', () => {})
      .on('status', (status) => resolve(status.code))
  })
}

let stopped = false
const counts = { read: {}, stream: {}, write: {} }

async function callRepeatedly(kind, one) {
  while (!stopped) {
    const code = await one()
    counts[kind][code] = (counts[kind][code] ?? 0) + 1
  }
}

const message = { role: 'CHAT_MESSAGE_ROLE_USER', content: 'once' }
const kinds = {
  read: () => call(sessions, 'GetChatSession', { session_id }),
  stream: () => stream(messages, 'ListChatMessages', { session_id, limit: 1 }),
  write: () => call(messages, 'CreateChatMessage', { session_id, message }),
}

await call(sessions, 'GetChatSession', { session_id })
console.log('reading')
process.stdin.on('end', () => { stopped = true }).resume()
await Promise.all(
  Object.entries(kinds).flatMap(([kind, one]) => Array.from({ length: 8 }, () => callRepeatedly(kind, one))),
)
console.log(JSON.stringify(counts))
sessions.close()
messages.close()
